"""The offline stage: raw text in, memory-mapped token shards out.

    inputs → plan → readers → tokenizer → sharding

`inputs` names the files, `plan` cuts them into work units, `readers` turn a unit into documents, `tokenizer` trains,
copies and applies byte-level BPE, `sharding` makes a unit's shards in the format of `ds_roberta.data.shards` and the
manifest of all, `dedup` finds what occurs again, `job` keeps the finished steps of a plan on disk under a `lease`,
`workers` runs the steps on processes or MPI ranks, `cli` is the `preprocess` command.
"""
