"""BEVT pretraining: hide part of a clip, ask the network which visual token was there."""

__version__ = "0.1.0"
