"""How good masks are, and what connected parts they have.

``overlap`` and ``surface`` score one pair of masks, ``report`` a folder of them, ``components`` and
``postprocessing`` remove islands, ``figures`` draws. No torch.
"""
