"""The four verbs: plan, train, predict, evaluate; each composes the layers below, none prints.

Each verb is a module, so that predicting does not load what only planning needs;
``import medmamba`` names them all.
"""
