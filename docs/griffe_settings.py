"""Shows a setting's help and default in the Python reference, in place of the call that declares it."""

import ast
import importlib

from griffe import Attribute, Docstring, Extension


class SettingsExtension(Extension):
    def on_attribute_instance(self, *, node: ast.AST, attr: Attribute, agent, **kwargs) -> None:
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "setting":
            return
        named = {each.arg: each.value for each in call.keywords}
        values = [*call.args, *(named[name] for name in ("default", "help") if name in named)]
        names = vars(importlib.import_module(agent.current.module.path))  # of which a help text may be made
        attr.value = ast.unparse(values[0]) if len(values) > 1 else None
        attr.docstring = Docstring(eval(ast.unparse(values[-1]), names), parent=attr)
