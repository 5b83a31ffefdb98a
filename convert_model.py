"""Write a model in another format: `python convert_model.py MODEL OUTPUT [--type TYPE]`.

    python convert_model.py out out.gguf --type q8_0    # for llama.cpp and Ollama
    python convert_model.py gpt2 gpt2.bin --type bf16   # for llm.c
    python convert_model.py model.gguf model            # a Hugging Face folder, for transformers
"""
from pathlib import Path

from cli import OneLineParser, UserError, note, run_program
from files import locked_folder
from gguf_files import FILE_TYPES, write_gguf
from model_files import find_model, load_model, load_model_tokenizer, save_llmc, save_model
from tokenizer import GPT2_FINGERPRINT

LLMC_VERSIONS = {"f32": 3, "bf16": 5}
OUT_OF_MEMORY_HINT = "choose a smaller model"


def main():
    parser = OneLineParser(description="Write a model in another format.")
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, such as train_gpt2.py writes; a .safetensors, "
                        ".gguf or llm.c .bin file; or a name on the Hugging Face hub")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="NAME.gguf for llama.cpp and Ollama, NAME.bin for llm.c, "
                        "or a folder for transformers; overwritten")
    parser.add_flag("--type", default="f32", choices=FILE_TYPES, help="of the weights: f32; bf16 not in a folder; f16, q8_0 (8 "
                    "bits) and q4_0 (4 bits) only in a .gguf")
    options = parser.parse_args()
    output, suffix = options.output, options.output.suffix.lower()
    types = {".gguf": FILE_TYPES, ".bin": LLMC_VERSIONS}.get(suffix, ["f32"])
    if options.type not in types:
        parser.error(f"--type is {options.type}, expected {' or '.join(types)} for {output}")
    if suffix == ".safetensors":
        parser.error(f"OUTPUT is {output}, expected a folder, in which model.safetensors will be, or a .gguf or .bin file")

    path = find_model(options.model)
    config, params = load_model(path)
    written, tokenizer = output, load_model_tokenizer(path, config.vocab_size)
    if suffix == ".bin":
        if tokenizer.fingerprint not in (0, GPT2_FINGERPRINT):
            raise UserError(f"{output}: llm.c's files have no tokenizer, and the model's is not GPT-2's; write a folder or a "
                            ".gguf file")
        save_llmc(output, config, params, LLMC_VERSIONS[options.type])
    elif suffix == ".gguf":
        if "gelu_exact" in config.layers:
            note("the model's activation is GELU itself; llama.cpp and llm.c compute the tanh form, so results differ a little")
        write_gguf(output, config, params, tokenizer, options.type)
    else:
        with locked_folder("OUTPUT", output):
            save_model(output, config, params, tokenizer)
        written = output / "model.safetensors"
    print(f"wrote {written}: {config.num_layers} layers, {params.size / 1e6:,.1f} M parameters, "
          f"{written.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_program(main, OUT_OF_MEMORY_HINT)
