# One block on tiny Shakespeare, on a laptop's CPU: a plain GPT of 0.21M parameters.
# python train.py config/train_shakespeare_char_cpu.py
# Loss to expect: 1.73 on validation after 2,000 steps, about 50 s on two CPU cores (nanoGPT's
# README command for the CPU: 0.80M parameters, 1.90, about 110 s on the same ones).
# Losses of three seeds, which `against` of runs.py table takes:
# docs/curves/train_shakespeare_char_cpu.jsonl

out_dir = "out-shakespeare-char-cpu"
init_from = "auto"  # run again, it goes on or is done
dataset = "shakespeare_char"
compile = False  # would take longer than it saves

n_layer = 1
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
log_interval = 100
