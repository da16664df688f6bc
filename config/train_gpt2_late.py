# GPT-2 (124M) whose four middle blocks are applied twice from half of the training on; the FLOPs of
# train_gpt2.py in fewer steps. One node of 8 GPUs, days.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_late.py
# Loss to expect: not measured. NanoGPT Slowrun (github.com/qlabs-eng/slowrun) reports gains from
# repeating middle blocks late; small models on a CPU are in LOG.md.

out_dir = "out-gpt2-late"
init_from = "auto"  # run again after any death, it goes on
dataset = "openwebtext"

n_layer = 12
loop_groups = [[4, 5, 6, 7]]
n_loop = 2
loop_start = 0.5  # of max_iters: every step before it loops once
input_injection = "passthrough"  # at one loop it is GPT-2, and the second begins where that ends
loop_norm = "none"
n_head = 12
n_embd = 768
block_size = 1024
bias = False

batch_size = 12
gradient_accumulation_steps = 40  # 12 x 1024 x 40 = 491,520 tokens
loss_chunk = 2048  # tokens whose 50,304 logits exist at once
max_iters = 535000
learning_rate = 6e-4
weight_decay = 0.1
warmup_iters = 2000
min_lr = 6e-5

eval_interval = 1000
eval_iters = 200
eval_loops = 1, 2, 3
log_interval = 10
