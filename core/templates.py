"""The chat templates for models that bring none. Which one a model gets depends on the tokens it already knows: none is ever added."""

# All know the roles system, user, assistant and tool, end every turn with a real token, and can ask for an answer.

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# As Gemma's own: the assistant is called model, and a system message begins the first turn of the user.
GEMMA = """\
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set system.text = system.text + message['content'] + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message['role'] == 'assistant' else 'user' -%}
{{ '<start_of_turn>' + role + '\\n' + system.text + message['content'] + '<end_of_turn>\\n' }}
{%- set system.text = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

PLAIN = """\
{%- for message in messages -%}
{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}"""

BUILT_IN = {  # name: (the tokens a vocabulary must have, the template)
    "sftkit:chatml": (("<|im_start|>", "<|im_end|>"), CHATML),
    "sftkit:gemma": (("<start_of_turn>", "<end_of_turn>"), GEMMA),
    "sftkit:plain": ((), PLAIN),
}

# Tokens that vocabularies reserve for padding or for nothing, the best first; patterns are matched from the beginning.
PAD_CANDIDATES = (
    r"<pad>$", r"<\|pad\|>$", r"\[PAD\]$", r"<PAD>$", r"<\|finetune_right_pad_id\|>$", r"<\|padding\|>$", r"<\|pad_token\|>$",
    r"<\|endoftext\|>$", r"<\|(?:vision|image|fim)_pad\|>$", r"<fim_pad>$",
    r"<\|?reserved_.*>$", r"<\|reserved_special_token_\d+\|>$", r"<unused_?\d+>$", r"\[unused\d+\]$", r"<\|extra_\d+\|>$",
    r"<\|dummy_\d+\|>$", r"<\|placeholder\d+\|>$", r"<SPECIAL_\d+>$", r"<repo_name>$", r"<filename>$", r"<unk>$",
)  # fmt: skip
