"""The offline stage: raw text in, memory-mapped token shards out.

    inputs → plan → readers → accept → sentences → encoders → units → sharding

`inputs` names the files, whose `formats` are told by their names; `plan` cuts them into work units at the `borders` of
documents; `readers` and `tables` turn a unit, by `streams` of bytes, into documents (`pieces`); `accept` keeps or
rejects them and `accounts` says what became of each; `sentences` divides their text; `tokenizer` trains
and copies byte-level BPE, `encoders` apply it, `units` makes a unit's shards in the format of
`ds_roberta.data.shards`, `sharding` the manifest of all, `dedup` finds what occurs again. `job` keeps the finished
steps of a plan on disk under a `lease`, `workers` runs the steps on processes or MPI ranks. `commands` are the two ways
through all this as functions, `cli` is the `preprocess` command.

Of prepared data, `verify` finds damage, `stats` counts, `show` prints documents, `trace` names the documents in a
step's batch (the last two by `lookup`), and `megatron` exports and imports.
"""
