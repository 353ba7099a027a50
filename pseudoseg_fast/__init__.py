"""Semantic segmentation from a few masks and many unlabelled pictures: PseudoSeg in one stage, fast."""

__version__ = "0.1.0"
