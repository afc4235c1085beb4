"""Doors to other tools, one file each; the tools themselves are imported only by who opens a door.

pytorch             to_torch, from_torch: a Classifier as a torch.nn.Module, and back; a file for AutoAttack
clustr_torch        its PyTorch side, which needs nothing of ours: it is copied beside an exported model
foolbox_model       to_foolbox: a Classifier for Foolbox's attacks
safetensors_file    save, load: a Classifier in one file
"""
