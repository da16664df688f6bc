# SmolLM2-360M folded into a loop and healed on your own text: its first four layers, eight of the
# others looped about three times, its last four: 16 of 32 layers, 32 in effect. At one loop and
# before any step it is the source cut to these layers. One GPU of 24 GB, two hours by the FLOPs of
# 2,000 steps (not run yet); five commands:
# python data/text/prepare.py --input_files='my/*.txt' --tokenizer=hf:HuggingFaceTB/SmolLM2-360M
# python train.py config/heal_smollm2.py
# python sample.py out-heal --start="The loop" --n_loop=4    (and at 1, 2, ...)
# python eval.py out-heal --tasks=arc_easy,hellaswag --loops=1,2,4
# python pretrained.py export out-heal --to=healed
# Another model: --init_from=hf:<folder>, n_prelude + n_block + n_coda at most its layers, and
# --block_size= at most its positions. A trial on a CPU: --compile=False --max_iters=20
# --batch_size=1 --gradient_accumulation_steps=1 --block_size=128 --warmup_iters=2
# Loss to expect: not measured; it is that of your text. Look at val at 1, 2, 4 and 8 loops.

out_dir = "out-heal"
init_from = "hf:HuggingFaceTB/SmolLM2-360M"  # also a folder; its tokenizer is that of the text
dataset = "mine"  # as data/text/prepare.py calls it

n_prelude = 4
n_block = 8
n_coda = 4
n_loop = 3
max_loops = 16
loop_sampling = "poisson"  # another depth each step, 4 in the mean, so that every depth works
loop_warmup_iters = 500  # from one loop, where the model is nearly its source (arXiv 2511.07384)
loop_warmup = "sqrt"
block_size = 1024  # of 8,192: positions are rotary

batch_size = 4
gradient_accumulation_steps = 16  # 4 x 1024 x 16 = 65,536 tokens
loss_chunk = 2048  # tokens whose 49,152 logits exist at once
recompute = "loop"  # activations of a loop anew in the backward pass
max_iters = 2000
learning_rate = 1e-4
lr_schedule = "wsd"
warmup_iters = 100
min_lr = 1e-6
weight_decay = 0.01

eval_interval = 100
eval_iters = 20
eval_loops = 1, 2, 4, 8
log_interval = 10
