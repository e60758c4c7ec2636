"""Fine-tune a language model with TRL's SFTTrainer, on JSON lines with `question` and `answer`.

python -m corda_vlm.examples.trl_language my-model kept.jsonl training.jsonl my-adapter
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import corda_vlm

model_path, kept_path, training_path, output = sys.argv[1:]
# Unless told otherwise, SFTTrainer computes in bfloat16, and keeps the first 1024 tokens of a sample.
config = SFTConfig(
    output, max_steps=50, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", bf16=False, completion_only_loss=True
)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path).to(config.device)
kept = Dataset.from_json(kept_path)
model = corda_vlm.prepare(model, kept, mode="kpm", rank=8, processor=tokenizer)
training = Dataset.from_json(training_path).map(
    lambda row: {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    },
    remove_columns=["question", "answer"],
)
keep = corda_vlm.KeepCallback(corda_vlm.Keep(kept, every=4), tokenizer)  # every fourth step holds to the base; leave out to save time
trainer = SFTTrainer(model, config, train_dataset=training, processing_class=tokenizer, callbacks=[keep])
trainer.train()
if trainer.is_world_process_zero():
    corda_vlm.export(model, output)
