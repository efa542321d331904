"""The offline stage: raw text in, memory-mapped token shards out.

    inputs → plan → readers → encoders → sharding → output

`inputs` names the files, `plan` cuts them into work units, `readers` turn a unit into documents, `tokenizer` trains
and copies byte-level BPE, `encoders` apply it, `sharding` makes a unit's shards in the format of
`ds_roberta.data.shards` and the manifest of all, `workers` runs the units on processes, `output` makes a folder appear
whole or not at all, `cli` is the `preprocess` command.
"""
