# A looped GPT in the shape that servers run: Llama's blocks, all of them looped twice, and the last
# norm after every loop (Nanbeige4.2's, arXiv 2607.22083), 0.80M parameters. Its export needs no
# code of ours in vLLM, SGLang, llama.cpp and MLX; a larger model has the same options.
# python train.py config/servable.py && python pretrained.py export out-servable --to=served
# Loss to expect: 1.32 on validation at its two loops, 1.97 at one, 1.60 at three; after 40 minutes
# on one CPU core that was busy with other work too (Python 3.11's library).

out_dir = "out-servable"
init_from = "auto"  # run again, it goes on or is done
dataset = "pycode"
compile = False  # would take longer than it saves

n_block = 4
n_loop = 2  # fixed: servers have one number of loops
input_injection = "passthrough"
loop_norm = "rmsnorm"
final_norm = False  # the loop's norm is the last
norm = "rmsnorm"
norm_eps = 1e-5
position = "rope"
mlp = "swiglu"
n_hidden = 352
bias = False
n_head = 2  # of 64 channels, which servers have kernels for
n_kv_head = 1
n_embd = 128
tie_weights = False
block_size = 128

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 800
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-2
warmup_iters = 50
min_lr = 0.0

eval_interval = 400
eval_iters = 25
eval_loops = 1, 2, 3, 4
log_interval = 50
