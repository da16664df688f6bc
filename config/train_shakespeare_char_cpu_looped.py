# The one block of train_shakespeare_char_cpu.py, looped six times on average, on a laptop's CPU:
# 0.22M parameters.
# python train.py config/train_shakespeare_char_cpu_looped.py
# Loss to expect: 1.62 to 1.63 on validation from 6 loops on, the same at 12 and 24, 1.92 at one;
# about 3 minutes on two CPU cores. The same block unlooped (--use_model_baseline=True): 1.73.
# Losses of three seeds, which `against` of runs.py table takes:
# docs/curves/train_shakespeare_char_cpu_looped.jsonl

out_dir = "out-shakespeare-char-cpu-looped"
init_from = "auto"  # run again, it goes on or is done
dataset = "shakespeare_char"
compile = False  # would take longer than it saves

n_block = 1
n_loop = 6
max_loops = 32
loop_sampling = "poisson"  # another depth each step, so that every depth works
bptt_k = 3  # gradient through the last three loops: cheaper, and good from any state
input_injection = "diagonal"  # forgets the old state at a learned rate, so that many loops settle
state_init = "zero"
loop_norm = "none"
n_head = 4
n_embd = 128
block_size = 64
bias = False
position = "rope"

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-2
warmup_iters = 50
min_lr = 0.0

eval_interval = 1000
eval_iters = 50
eval_loops = 1, 2, 6, 12, 24
log_interval = 100
