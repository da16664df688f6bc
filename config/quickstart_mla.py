# The quick start with latent attention, keys and values from one latent of 32 channels, on two CPU
# cores: minutes. A token takes 1,536 bytes of cache instead of 8,192.
# python train.py config/quickstart_mla.py
# python runs.py compare config/quickstart.py config/quickstart_mla.py   (both, side by side)
# Loss to expect: 1.29 on validation at 4, 8 and 16 loops, 1.34 at one.

from config.quickstart import *

out_dir = "out-quickstart-mla"
attention = "mla"
n_latent = 32
