# AdamW on everything, in place of Muon on the matrices of the block.
# python train.py config/recipe_adamw.py
# Loss to expect: 1.888 on validation at 6 loops; 1.713 with Muon.

from config.recipe import *

out_dir = "out-recipe-adamw"
optimizer = "adamw"
learning_rate = 3e-3
