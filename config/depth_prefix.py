# The dial: parities of all beginnings of a string, on two CPU cores, minutes. Trained up to 32
# digits, evaluated up to 256: more loops solve what no training row asked.
# python data/prefix/prepare.py
# python train.py config/depth_prefix.py
# Loss to expect: 0.0001 on validation, where all positions are right. LOG.md has what was right at
# 64, 128 and 256 digits.

out_dir = "out-depth-prefix"
init_from = "auto"
dataset = "prefix"
compile = False  # would take longer than it saves

n_block = 1
n_loop = 16
loop_norm = "rmsnorm"
input_injection = "add"
loop_noise_scale = 5.0  # the loops end at the same state, wherever they begin
n_head = 4
n_embd = 64
position = "rope"
attention_window = 4

loops_of_level = 0.5, 0  # a loop moves a sum on by up to three digits
loops_beyond = 12  # so that what is right stays right
level_warmup_iters = 600
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 1500
optimizer = "muon"
muon_learning_rate = 0.005
learning_rate = 1e-3
lr_schedule = "wsd"
hold_iters = 750
warmup_iters = 50
min_lr = 0.0

eval_interval = 1500
eval_iters = 1
eval_loops = 1, 2, 4, 8, 16, 32, 64, 128
automatic_loop_exit = True  # the table also says after how many loops rows end by themselves
log_interval = 100
