# nanoGPT's character-level Shakespeare: a plain GPT of 10.65M parameters, minutes on one GPU.
# python train.py config/train_shakespeare_char.py
# Loss to expect: nanoGPT reports a best validation loss of 1.4697 after 3 minutes on one A100 for
# this model, data and schedule. Not yet measured here: it needs a GPU.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
bias = False

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
learning_rate = 1e-3
beta2 = 0.99  # few tokens per step
warmup_iters = 100
min_lr = 1e-4

eval_interval = 250
eval_iters = 200
always_save_checkpoint = False  # it overfits: keep the best
log_interval = 10
