"""Names of transformers that are not here, each with the sentence that says what to use.

They stay absent: ``hasattr`` is False, so that other libraries do not mistake an object for one
that has them; who asks for one reads the sentence in the AttributeError.
"""

from __future__ import annotations

_PEFT = "adapters are peft's: peft.get_peft_model(model, config)"
_ENCODER = "this is an encoder; it has neither a decoder nor a cache, and generates nothing"
_KERNEL = "there is one attention here, the compiled kernel, and nothing to choose"
_SHARDING = "one process holds the whole model; several train copies, as torch's DDP does"
_HUB = "nothing is uploaded from here: save_pretrained, then huggingface_hub's upload_folder"
_LOADING = "part of how transformers loads; here from_pretrained and save_pretrained do all of it"
_QUANTIZED = "weights are float32 or float64 here, never quantized"
_CODE = "the code is this package's, never a file beside the weights"
_ROPE = "XLM-R's positions are learned or sinusoidal, never rotary"
_PARTS = "one configuration describes the whole model"
_CHECKS = "validate() checks everything"
_FILES = "from_pretrained reads a folder or hub name; from_dict takes a dict"


MODELS: dict[str, str] = {
    **dict.fromkeys(
        (
            "active_adapters",
            "add_adapter",
            "delete_adapter",
            "disable_adapters",
            "enable_adapters",
            "enable_peft_hotswap",
            "get_adapter_state_dict",
            "load_adapter",
            "set_adapter",
        ),
        _PEFT,
    ),
    **dict.fromkeys(
        (
            "generate",
            "generation_config_class",
            "get_decoder",
            "set_decoder",
            "set_encoder",
            "prepare_inputs_for_generation",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "get_compiled_call",
            "get_correct_attn_implementation",
            "get_correct_experts_implementation",
            "get_experts_implementation",
            "is_backend_compatible",
            "set_attn_implementation",
            "set_experts_implementation",
            "set_use_kernels",
            "use_kernels",
        ),
        _KERNEL,
    ),
    **dict.fromkeys(
        (
            "barrier_after_gathered_checkpoint_save",
            "ep_plan",
            "fsdp_plan",
            "fsdp_size",
            "gather_sharded_state_dict_for_save",
            "init_parallel_plans",
            "is_distributed_loading_by_transformers",
            "maybe_distribute_model",
            "pp_plan",
            "prepare_distribute_model",
            "save_distributed_checkpoint",
            "should_save_on_this_rank",
            "supports_context_parallel",
            "supports_pp_plan",
            "supports_tp_plan",
            "tp_plan",
            "tp_size",
        ),
        _SHARDING,
    ),
    **dict.fromkeys(("push_to_hub", "add_model_tags", "model_tags"), _HUB),
    **dict.fromkeys(
        (
            "all_tied_weights_keys",
            "get_expanded_tied_weights_keys",
            "get_init_context",
            "initialize_weights",
            "mark_tied_weights_as_initialized",
            "named_non_persistent_buffers",
            "retrieve_modules_from_names",
        ),
        _LOADING,
    ),
    **dict.fromkeys(("dequantize", "kernel_config"), _QUANTIZED),
    **dict.fromkeys(("is_custom_code", "is_remote_code", "register_for_auto_class"), _CODE),
    "can_record_outputs": "output_hidden_states and output_attentions say what is returned",
    "get_parameter_or_buffer": "torch's get_parameter and get_buffer do it",
    "input_modalities": "the one input is text",
    "loss_type": "the loss follows from labels and config.problem_type; others: outputs.logits",
    "loss_function": "the loss follows from labels and config.problem_type; others: outputs.logits",
    "prune_heads": "heads are not cut out; torch.nn.utils.prune zeroes weights",
    "resize_position_embeddings": "positions are as many as were trained",
    "set_output_embeddings": "the head has no map onto the vocabulary; XLMRobertaForMaskedLM has",
    # peft asks for it where it tunes a prefix of keys and values.
    "transformer_backbone_name": "an encoder has no past keys and values that a prefix could be; "
    "LoRA and prompt tuning work",
    "warn_if_padding_and_no_attention_mask": "without attention_mask every token counts",
}

CONFIGURATIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "convert_rope_params_to_dict",
            "default_rope_type",
            "default_theta",
            "ignore_keys_at_rope_validation",
            "nested_rope_parameter_keys",
            "rope_scaling",
            "standardize_rope_params",
        ),
        _ROPE,
    ),
    **dict.fromkeys(
        (
            "allow_global_per_layer_attribute_access",
            "get_mtp_config",
            "is_heterogeneous",
            "per_layer_attributes",
            "per_layer_config",
            "serialize_explicit_per_layer_config",
            "sub_configs",
            "sub_configs_defaults",
        ),
        _PARTS,
    ),
    **dict.fromkeys(("is_custom_code", "is_remote_code", "register_for_auto_class"), _CODE),
    **dict.fromkeys(
        (
            "validate_architecture",
            "validate_layer_type",
            "validate_output_attentions",
            "validate_rope",
            "validate_token_ids",
        ),
        _CHECKS,
    ),
    **dict.fromkeys(("from_json_file", "get_config_dict", "update_from_string"), _FILES),
    **dict.fromkeys(
        ("base_config_key", "default_config_fields", "dict_dtype_to_str"),
        "part of how transformers builds its configurations",
    ),
    **dict.fromkeys(
        ("base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan"),
        _SHARDING,
    ),
    **dict.fromkeys(
        ("extra_config_files", "extra_files"), "config.json is the one file of a configuration"
    ),
    "attribute_map": "a setting has one name",
    "keys_to_ignore_at_inference": "an output holds results alone",
    "name_or_path": "the model has it: model.name_or_path",
    "push_to_hub": _HUB,
}

_CHAT = "XLM-R is no chat model: it has no roles, templates or responses"
_PIECES = "the tokens are sentencepiece's; another library's tokenizer is not inside"
_FIXED_FORM = "a text is <s> ... </s>, a pair <s> ... </s></s> ... </s>, always"

TOKENIZERS: dict[str, str] = {
    **dict.fromkeys(
        (
            "apply_chat_template",
            "chat_control_tokens",
            "chat_template",
            "encode_message_with_chat_template",
            "get_chat_template",
            "get_response_parser",
            "parse_response",
            "response_template",
            "save_chat_templates",
        ),
        _CHAT,
    ),
    **dict.fromkeys(
        (
            "backend",
            "backend_tokenizer",
            "can_save_slow_tokenizer",
            "convert_to_native_format",
            "decoder",
            "model",
            "set_truncation_and_padding",
            "slow_tokenizer_class",
        ),
        _PIECES,
    ),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "update_post_processor"),
        _FIXED_FORM,
    ),
    **dict.fromkeys(
        (
            "clean_up_tokenization",
            "clean_up_tokenization_spaces",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        ),
        "decoding leaves the spaces as sentencepiece has them",
    ),
    **dict.fromkeys(
        (
            "SPECIAL_TOKENS_ATTRIBUTES",
            "convert_added_tokens",
            "deprecation_warnings",
            "files_loaded",
            "init_inputs",
            "init_kwargs",
            "pretrained_vocab_files_map",
            "verbose",
        ),
        "part of how transformers builds its tokenizers",
    ),
    "push_to_hub": _HUB,
    "register_for_auto_class": _CODE,
    "save_vocabulary": "save_pretrained writes sentencepiece.bpe.model and the settings",
    "split_special_tokens": "it is an argument of the call: tokenizer(text, split_special_tokens=)",
    "train_new_from_iterator": "sentencepiece trains vocabularies; weights belong to this one",
}

_XL = "XL and XXL are pre-LayerNorm models, which xlmr_ext does not have"
_AUTO = "name the class: XLMRobertaForSequenceClassification, XLMRobertaTokenizer, ..."


def package_hint(name: str) -> str:
    """What to say of a name of transformers that the package itself lacks; "" of any other."""
    if name.startswith("XLMRobertaXL"):
        return _XL
    if name.startswith("Auto"):
        return _AUTO
    return {
        "XLMRobertaForCausalLM": _ENCODER,
        "XLMRobertaPreTrainedModel": "the base class is xlmr_ext.pretrained.PreTrainedModel",
        "XLMRobertaTokenizerFast": "XLMRobertaTokenizer is the fast one",
        "Trainer": "from xlmr_ext.hf_trainer import Trainer",
    }.get(name, "")
