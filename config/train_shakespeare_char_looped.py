# The looped twin of train_shakespeare_char.py: 2 + 2x4 + 2 blocks in place of 6, the same
# parameters but for the injection, twice the effective depth; minutes on one GPU.
# python train.py config/train_shakespeare_char_looped.py
# Loss to expect: not yet measured, it needs a GPU. The plain twin's 1.47 is the mark;
# --use_model_baseline=True runs these same blocks unlooped.

out_dir = "out-shakespeare-char-looped"
dataset = "shakespeare_char"

n_prelude = 2
n_block = 2
n_coda = 2
n_loop = 4
max_loops = 16
loop_sampling = "poisson"
bptt_k = 4
input_injection = "diagonal"
state_init = "zero"
loop_norm = "none"
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
eval_loops = 1, 2, 4, 8, 16
always_save_checkpoint = False  # it overfits: keep the best
log_interval = 10
