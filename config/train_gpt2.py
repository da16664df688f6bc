# GPT-2 (124M) on OpenWebText as nanoGPT trains it: 0.5M tokens per step, 300B tokens, one node of
# 8 GPUs, days.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# Loss to expect: nanoGPT reports 2.85 on validation after 5 days on 8 A100 (40 GB). Not measured
# here.

out_dir = "out-gpt2"
init_from = "auto"  # run again after any death, it goes on
dataset = "openwebtext"

n_layer = 12
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
log_interval = 10
