# The looped twin of train_gpt2.py: 2 + 4x4 + 2 blocks of GPT-2's width, 96M parameters, 20
# effective layers; one node of 8 GPUs, 33 hours on H100s at 40 % of their peak, as bench.py plan
# assumes.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_looped.py
# Loss to expect: not measured. The plain twin's 2.85 with 124M parameters is the mark.

out_dir = "out-gpt2-looped"
init_from = "auto"  # run again after any death, it goes on
dataset = "openwebtext"

n_prelude = 2
n_block = 4
n_coda = 2
n_loop = 4
max_loops = 32
loop_sampling = "poisson"  # another depth each step, so that every depth works
bptt_k = 4
input_injection = "diagonal"
state_init = "zero"
loop_norm = "none"
n_head = 12
n_embd = 768
block_size = 1024
bias = False

batch_size = 12
gradient_accumulation_steps = 40  # 12 x 1024 x 40 = 491,520 tokens
loss_chunk = 2048  # tokens whose 50,304 logits exist at once
max_iters = 600000
learning_rate = 6e-4
weight_decay = 0.1
warmup_iters = 2000
min_lr = 6e-5

eval_interval = 1000
eval_iters = 200
eval_loops = 1, 2, 4, 8, 16
log_interval = 10
