"""The offline stage: raw text in, memory-mapped token shards out.

    inputs → plan → readers → tokenizer → units → sharding

`inputs` names the files, `plan` cuts them into work units, `readers` turn a unit into documents, `tokenizer` trains,
copies and applies byte-level BPE, `units` makes a unit's shards in the format of `ds_roberta.data.shards`, `sharding`
the manifest of all, `dedup` finds what occurs again. `job` keeps the finished steps of a plan on disk under a `lease`,
`workers` runs the steps on processes or MPI ranks, `cli` is the `preprocess` command.

Of prepared data, `verify` finds damage, `stats` counts, `show` prints documents, `trace` names the documents in a
step's batch (the last two by `lookup`), and `megatron` exports and imports.
"""
