# The quick start with latent attention, keys and values from one latent of 32 channels, on two CPU
# cores: about 200 s.
# python train.py config/quickstart_mla.py
# python runs.py compare config/quickstart.py config/quickstart_mla.py   (both, side by side)
# Loss to expect: not yet measured.

from config.quickstart import *

out_dir = "out-quickstart-mla"
attention = "mla"
n_latent = 32
