"""The offline stage: raw text in, memory-mapped token shards out.

    inputs → plan → readers → accept → sentences → encoders → sharding

`inputs` names the files, whose `formats` are told by their names; `plan` cuts them into work units at the `borders` of
documents; `readers` and `tables` turn a unit, by `streams` of bytes, into documents (`pieces`); `accept` keeps or
rejects them and `accounts` says what became of each; `sentences` divides their text; `tokenizer` trains
and copies byte-level BPE, `encoders` apply it, `sharding` makes a unit's shards in the format of
`ds_roberta.data.shards` and the manifest of all, `workers` runs the units on processes, `cli` is the `preprocess`
command.

Of prepared data, `verify` finds damage, `stats` counts, `show` prints documents, `trace` names the documents in a
step's batch (the last two by `lookup`), and `megatron` exports and imports.
"""
