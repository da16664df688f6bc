# Multi-head latent attention on tiny Shakespeare, on a laptop's CPU: two plain blocks whose keys
# and values come from a latent of a quarter of the width. The multi-head twin is the same command
# with --attention=mha --out_dir=...
# python train.py config/train_shakespeare_char_mla.py
# Loss to expect: 1.63 on validation with 384 bytes of cache per token (0.38M parameters), where
# the multi-head twin has 1.63 with 2,048 (0.40M); about 100 s on two CPU cores.

out_dir = "out-shakespeare-char-mla"
init_from = "auto"  # run again, it goes on or is done
dataset = "shakespeare_char"
compile = False  # would take longer than it saves

n_layer = 2
n_head = 4
n_embd = 128
attention = "mla"
n_latent = 32
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
eval_iters = 150
log_interval = 100
