"""LLVM IR text -> an object file in memory, for one CPU.

    data = compile_object(text, target)      the bytes of an ELF object with the functions of `text`
    asm  = compile_assembly(text, target)    the same as assembly text, for reading

The generated text is nearly final (see codegen/llvm.py), so only the promotion of register tiles
runs as an IR pass; LLVM's code generator does the rest.
"""

from __future__ import annotations

import llvmlite.binding as llvm

from minicompiler.errors import CodegenError
from minicompiler.target import Target

_ready: list[bool] = []
_machines: dict[tuple[str, str, int], llvm.TargetMachine] = {}


def _machine(target: Target, opt: int) -> llvm.TargetMachine:
    if not _ready:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        _ready.append(True)
    key = (target.cpu_name, target.llvm_features, opt)
    found = _machines.get(key)
    if found is None:
        triple = llvm.get_process_triple()
        found = _machines[key] = llvm.Target.from_triple(triple).create_target_machine(
            cpu=target.cpu_name,
            features=target.llvm_features,
            opt=opt,
            reloc="pic",
            codemodel="small",
        )
    return found


def module_text(functions: str, target: Target) -> str:
    """A whole module around some functions: attributes that every kernel carries."""
    width = target.vector_bytes * 8
    attributes = (
        f'attributes #0 = {{ nounwind "target-features"="{target.llvm_features}" '
        f'"tune-cpu"="{target.cpu_name}" "prefer-vector-width"="{width}" '
        f'"min-legal-vector-width"="{width}" "no-trapping-math"="true" }}\n'
    )
    # What !nontemporal and !prof refer to.
    marks = '!0 = !{i32 1}\n!1 = !{!"branch_weights", i32 1, i32 2000}\n'
    return functions + attributes + marks


def _module(text: str, target: Target, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    try:
        module = llvm.parse_assembly(module_text(text, target))
        module.verify()
    except RuntimeError as e:
        raise CodegenError(f"LLVM refused the generated code: {str(e).strip()[:600]}") from None
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    for f in module.functions:
        if not f.is_declaration:
            passes.run(f, builder)
    return module


def compile_object(text: str, target: Target, opt: int = 2) -> bytes:
    """An object file. Raises CodegenError when LLVM does not accept the text."""
    machine = _machine(target, opt)
    data: bytes = machine.emit_object(_module(text, target, machine))
    return data


def compile_assembly(text: str, target: Target, opt: int = 2) -> str:
    """The assembly of the same code."""
    machine = _machine(target, opt)
    result: str = machine.emit_assembly(_module(text, target, machine))
    return result
