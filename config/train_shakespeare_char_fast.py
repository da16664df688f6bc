# The fastest road known here to the loss of nanoGPT's README command for the CPU (1.898 over the
# whole validation split of tiny Shakespeare): one plain block of 0.14M parameters.
# python train.py config/train_shakespeare_char_fast.py
# Loss to expect: 1.882 over the whole validation split after 280 steps (1.892 with --seed=1),
# 17 s on two CPU cores without AVX-512, where nanoGPT's takes 166 s; whole processes, measured by
# python bench.py race config/train_shakespeare_char_fast.py --peer=../nanoGPT

out_dir = "out-shakespeare-char-fast"
init_from = "auto"  # run again, it goes on or is done
dataset = "shakespeare_char"
compile = False  # would take longer than it saves

n_layer = 1
n_head = 4
n_embd = 128
n_hidden = 256
embedding_scale = 4.0  # the embedding is the head's matrix too, and small
block_size = 64
bias = False
position = "rope"

batch_size = 24
gradient_accumulation_steps = 1
max_iters = 280
optimizer = "muon"
muon_learning_rate = 0.05
learning_rate = 2e-2
lr_schedule = "linear"
warmup_iters = 10
min_lr = 0.0

eval_interval = 280
eval_iters = 10
log_interval = 40
