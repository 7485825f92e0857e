"""The workload's chat template, as ms-swift writes them: `--external_plugins swift_template.py --template bench`."""

from swift.template import TemplateMeta, register_template

register_template(
    TemplateMeta(
        "bench",
        prefix=[],
        prompt=["<|im_start|>user\n{{QUERY}}<|im_end|><|im_start|>assistant\n"],
        chat_sep=["<|im_end|>"],
        suffix=["<|im_end|>"],
        system_prefix=["<|im_start|>system\n{{SYSTEM}}<|im_end|>"],
    )
)
