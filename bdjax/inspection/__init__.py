"""Analyses for visual inspection: Grad-CAM, feature maps, cross-trigger matrices, pictures of triggers.

All functions return arrays; `bdjax.reporting.plots` draws them.
"""
