"""From a trained network and images to masks on the images' own grids.

``tiling`` and ``sliding_window`` run the network over one array, ``predictor`` turns one case into
one mask, ``engine`` does it for many cases and never loses one. Nothing is imported here, so that
commands without a network do not pay for torch.
"""
