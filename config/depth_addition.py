# The dial: long addition, on two CPU cores, minutes. Trained up to 8 digits, evaluated up to 32:
# more loops carry further than any training row asked.
# python data/addition/prepare.py --columns --hard_digits=32
# python train.py config/depth_addition.py
# Loss to expect: 0.0001 on validation; all rows of 9 to 32 digits were right.

out_dir = "out-depth-addition"
init_from = "auto"
dataset = "addition"
compile = False  # would take longer than it saves

n_prelude = 1
n_block = 1
n_loop = 9
loop_norm = "rmsnorm"
input_injection = "add"
n_head = 4
n_embd = 64
position = "rope"
attention_window = 4  # its own column and the one before it

loops_of_level = 1, 1  # as many loops as the sum has digits
loops_beyond = 6
level_warmup_iters = 400
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 1500
optimizer = "muon"
muon_learning_rate = 0.01
learning_rate = 1e-3
lr_schedule = "wsd"
hold_iters = 750
warmup_iters = 50
min_lr = 0.0

eval_interval = 1500
eval_iters = 2
eval_loops = 9, 33
log_interval = 100
