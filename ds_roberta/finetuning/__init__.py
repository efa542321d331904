"""Fine-tuning of a transformers folder on labelled texts, and prediction with the result.

Files (`labelled_tables`, `labels`, `tagged_sentences`, `conllu`, `entity_spans`, `squad`) → a task (`classification`,
`multi_label`, `token_classification`, `question_answering`): token ids with labels, a loss, metrics → runs of
transformers' Trainer (`one_run`), one for each setting and seed → the best of them as a folder (`finetune`) → answers
for new texts (`predict`).
"""

from ds_roberta.finetuning.classification import Classification, Regression
from ds_roberta.finetuning.multi_label import MultiLabelClassification
from ds_roberta.finetuning.question_answering import QuestionAnswering
from ds_roberta.finetuning.task import Task
from ds_roberta.finetuning.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, MultiLabelClassification, Regression, TokenClassification, QuestionAnswering)
}
"""Every task by its name."""
