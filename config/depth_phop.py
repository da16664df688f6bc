# The dial: p-hop induction with as many loops as hops, on two CPU cores, minutes. Trained up to 6
# hops, evaluated up to 24: more loops solve what no training row asked.
# python data/phop/prepare.py --every_position --symbols=4 --length=96 --hops=6 --hard_hops=24
# python train.py config/depth_phop.py
# Loss to expect: 0.0000 at 6 hops and loops. At 24 hops and loops 99.9 % of positions are right.
# Plain models of 7 and 13 blocks learn the six hops too, and nothing beyond (LOG.md).

out_dir = "out-depth-phop"
init_from = "auto"
dataset = "phop"
compile = False  # would take longer than it saves

n_prelude = 1
n_block = 1
n_loop = 6
loop_norm = "rmsnorm"
input_injection = "inject"  # with add one seed of four fails beyond 7 hops
n_head = 2
n_embd = 64
n_hidden = 128
position = "rope"

loops_of_level = 1, 0  # as many loops as hops
level_warmup_iters = 800  # at first one hop, then up to two, ...
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 3000
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 3e-3
lr_schedule = "wsd"
hold_iters = 1500
warmup_iters = 50
min_lr = 0.0

eval_interval = 3000
eval_iters = 8
eval_loops = 1, 6, 12, 24
log_interval = 100
