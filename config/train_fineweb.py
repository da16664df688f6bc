# A looped GPT on 10B tokens of FineWeb, with the parts of today: 2 + 4x4 + 2 blocks, rotary
# positions, SwiGLU, RMSNorm, Muon; 115M parameters, one node of 8 GPUs, hours.
# torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb.py
# Loss to expect: not measured, it needs GPUs. --use_model_baseline=True trains the control.

out_dir = "out-fineweb"
init_from = "auto"  # run again after any death, it goes on
dataset = "fineweb"

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
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"

batch_size = 16
gradient_accumulation_steps = 32  # 16 x 1024 x 32 = 524,288 tokens
loss_chunk = 2048  # tokens whose 50,304 logits exist at once
max_iters = 19000  # 10B tokens, one epoch
optimizer = "muon"
learning_rate = 3e-3
warmup_iters = 250
min_lr = 0.0

eval_interval = 1000
eval_iters = 200
eval_loops = 1, 2, 4, 8, 16
log_interval = 10
