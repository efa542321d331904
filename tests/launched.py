"""What the commands of `launch/` import in their course: `forked.py` starts them from a process that has done so."""

import gc
import os

import transformers.models.roberta.modeling_roberta
import transformers.trainer  # noqa: F401

import ds_roberta.finetuning.finetune
import ds_roberta.finetuning.predict
import ds_roberta.training.export
import ds_roberta.training.initial_model
import ds_roberta.training.run  # noqa: F401

gc.freeze()  # DeepSpeed collects garbage often, half a second each time if it looks at all that is imported
os.fsync = lambda descriptor: None  # it waits for the disk; a kill forgets nothing, only a power cut does
