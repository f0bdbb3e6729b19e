"""Engines of vllm-ascend on Huawei's NPUs: the only room that knows of them."""
