# A looped GPT on Python source code, byte by byte, on two CPU cores: two blocks, applied once in
# the first half of training, then one to seven times, as drawn anew for each step.
# python train.py config/quickstart.py
# Loss to expect: 1.25 to 1.26 on validation at 4, 8 and 16 loops, 1.30 to 1.32 at one, after 150 to
# 220 s (Python 3.11's library; four seeds). Until half of the training only the loss at one loop
# falls. Losses of these four, which `against` of runs.py table takes: docs/curves/quickstart.jsonl

out_dir = "out-quickstart"
init_from = "auto"  # run again, it goes on or is done
dataset = "pycode"
compile = False  # would take longer than it saves

n_block = 2
embedding_scale = 4.0  # learns faster: LOG.md has what was tried
n_loop = 4
max_loops = 16
loop_start = 0.5  # the first half of the steps loops once, which is cheap: more steps for the FLOPs
loop_sampling = "uniform"  # another depth each step, so that every depth works
bptt_k = 3  # gradient through the last three loops: cheaper, and good from any state
input_injection = "diagonal"  # forgets the old state at a learned rate, so that many loops settle
state_init = "zero"
loop_norm = "none"
n_head = 4
n_embd = 128
block_size = 128
bias = False
position = "rope"

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 1350
optimizer = "muon"
muon_learning_rate = 0.03
muon_row_norm = True
learning_rate = 1e-2
warmup_iters = 50
min_lr = 0.0

eval_interval = 450
eval_iters = 25
eval_loops = 1, 2, 4, 8, 16
log_interval = 50
