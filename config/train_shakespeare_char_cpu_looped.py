# The one block of train_shakespeare_char_cpu.py, on a laptop's CPU: applied once in the first half
# of training, then one to seven times, four on average. 0.22M parameters; as many FLOPs as 8,768
# steps of the plain block (1.62).
# python train.py config/train_shakespeare_char_cpu_looped.py
# Loss to expect: 1.60 to 1.61 on validation at 4, 8 and 16 loops, 1.70 at one; about 4 minutes on
# two CPU cores.
# Losses of three seeds, which `against` of runs.py table takes:
# docs/curves/train_shakespeare_char_cpu_looped.jsonl

out_dir = "out-shakespeare-char-cpu-looped"
init_from = "auto"  # run again, it goes on or is done
dataset = "shakespeare_char"
compile = False  # would take longer than it saves

n_block = 1
n_loop = 4
max_loops = 32
loop_start = 0.5  # the first half of the steps loops once, which is cheap: more steps for the FLOPs
loop_sampling = "uniform"  # another depth each step, so that every depth works
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
max_iters = 4100
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-2
warmup_iters = 50
min_lr = 0.0

eval_interval = 1000
eval_iters = 150  # all of validation
eval_loops = 1, 2, 8, 16
log_interval = 100
