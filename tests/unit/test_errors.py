from ds_roberta.errors import unknown_key_message


def test_an_unknown_key_names_the_nearest_known_one_if_any_is_near():
    assert unknown_key_message("key", "stge", ["stage", "enabled"]) == "unknown key 'stge'; did you mean 'stage'?"
    assert unknown_key_message("key", "STAGE", ["stage", "enabled"]) == "unknown key 'STAGE'; did you mean 'stage'?"
    assert unknown_key_message("key", "fp32", ["fp16", "bf16"]) == "unknown key 'fp32'"
    assert unknown_key_message("option", "zzz", ["stage", "enabled"]) == "unknown option 'zzz'"
