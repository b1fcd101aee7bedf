"""The class named in our plans is there, and builds the planned network."""

import importlib

import torch

from medmamba.plans.nnunet_schema import OUR_NETWORK_CLASS


def test_the_class_of_our_plans_builds_the_network():
    module, name = OUR_NETWORK_CLASS.rsplit(".", 1)
    planned = getattr(importlib.import_module(module), name)
    network = planned(
        1, 3, network="lightm_unet_s", patch_size=[8, 16, 8], features_per_stage=[8, 16, 32, 64],
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], kernel_sizes=[[3, 3, 3]] * 4,
        n_conv_per_stage=[1, 2, 2, 4], n_conv_per_stage_decoder=[1, 1, 1],
        conv_op=torch.nn.Conv3d, norm_op=None, deep_supervision=False,
    )  # fmt: skip
    assert network(torch.zeros(1, 1, 8, 16, 8)).shape == (1, 3, 8, 16, 8)
    network.decoder.deep_supervision = True
    outputs = network(torch.zeros(1, 1, 8, 16, 8))
    assert isinstance(outputs, list)
    assert outputs[0].shape == (1, 3, 8, 16, 8)
    assert "network" in next(iter(network.state_dict()))
