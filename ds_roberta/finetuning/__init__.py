"""Fine-tuning of a transformers folder on labelled texts, and prediction with what came out.

Files → tables (`tables`) → labelled examples (`examples`) → token ids (`model`) → runs of transformers' Trainer
(`trainer`), one per setting and seed → the best of them as a folder (`finetune`) → labels of new texts (`predict`).
"""
