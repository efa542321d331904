"""Fine-tuning of a transformers folder on labelled texts, and prediction with what came out.

Files (`labelled_tables`, `tagged_sentences`, `squad`) → a task (`classification`, `token_classification`,
`question_answering`): token ids with labels, a loss, a measure → runs of transformers' Trainer (`one_run`), one per
setting and seed → the best of them as a folder (`finetune`) → answers about new texts (`predict`).
"""
