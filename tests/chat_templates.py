"""Chat templates as model families have them, written anew and shortened to what matters here.

That is how roles are marked, how an answer is opened, and what becomes of system messages and of thoughts.
"""

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"

CHATML = (
    _LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n" + _END + "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {
    # BOS, then a header for every role
    "llama-3": (
        "{{ bos_token }}" + _LOOP + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
        "<|eot_id|>"
        + _END
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # a system message of its own where none is given
    "qwen2.5": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
    ),
    # thoughts, unless they are switched off; earlier answers lose theirs
    "qwen3": (
        _LOOP + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n" + _END + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    # no system role: an error; the assistant is called the model; roles must take turns
    "gemma-2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + _LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n" + _END + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # no system role: an error; nothing opens an answer but the end of the question
    "mistral-v0.1": (
        "{{ bos_token }}" + _LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}"
        "{% endif %}" + _END
    ),
    # system messages are dropped without a word
    "phi-3": (
        "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}<|end|>\n<|assistant|>\n"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>\n{% endif %}" + _END
    ),
    # the system message inside the first question
    "llama-2": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% set rest = messages[1:] if system else messages %}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    # thoughts that nothing switches off
    "deepseek-r1": (
        "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
        "<|User|>{{ m['content'] }}{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}"
        "{% endif %}" + _END + "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
    # channels: an answer is the final one
    "gpt-oss": (
        _LOOP
        + "{% if m['role'] == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>"
        "{% else %}<|start|>{{ 'developer' if m['role'] == 'system' else m['role'] }}<|message|>{{ m['content'] }}"
        "<|end|>"
        "{% endif %}" + _END + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    # no answer may come last, and none is kept as it was written
    "capitals": (
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('the last message must be of the user') }}"
        "{% endif %}"
        + _LOOP
        + "[{{ m['role'] | upper }}] {{ m['content'] }}\n"
        + _END
        + "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
    ),
}
WITHOUT_SYSTEM = {"gemma-2", "mistral-v0.1", "phi-3"}
ANSWER_OPENS_WITH = {
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2.5": "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "gemma-2": "<start_of_turn>model\n",
    "mistral-v0.1": " [/INST]",
    "phi-3": "<|assistant|>\n",
    "llama-2": " [/INST]",
    "deepseek-r1": "<|Assistant|><think>\n</think>\n\n",
    "gpt-oss": "<|start|>assistant<|channel|>final<|message|>",
    "capitals": "[ASSISTANT] ",
}
