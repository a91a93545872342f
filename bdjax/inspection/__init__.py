"""What a person looks at: Grad-CAM, feature maps, the cross-trigger matrices, triggers as pictures.

Everything here ends in arrays; `bdjax.reporting.plots` draws them.
"""
