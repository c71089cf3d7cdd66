"""Chat templates by name, in Jinja as transformers reads it."""

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}
{%- elif message.role == 'user' -%}{{ '### Instruction:\n' + message.content + '\n\n' }}
{%- else -%}{{ '### Response:\n' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif -%}
"""

PLAIN = """\
{%- for message in messages -%}
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor -%}
"""

TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}
"""ChatML (OpenAI 2023), Alpaca's headings (Taori et al. 2023), and no words of its own."""
