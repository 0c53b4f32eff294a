"""The structures of ``host/launch_abi.h``, for ctypes: the same fields in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from typing import ClassVar


class ParameterRecord(ctypes.Structure):
    _fields_: ClassVar = [
        ("pretty_function", c_char_p),
        ("size", c_uint64),
        ("kind", c_int32),
        ("is_pointer", c_int32),
        ("is_const", c_int32),
    ]


class KernelRecord(ctypes.Structure):
    _fields_: ClassVar = [
        ("index", c_int32),
        ("parameter_count", c_int32),
        ("parameters", POINTER(ParameterRecord)),
        ("invoke", c_void_p),
        ("next", c_void_p),
    ]


class ArgumentRecord(ctypes.Structure):
    _fields_: ClassVar = [
        ("address", c_uint64),
        ("bytes", c_uint64),
        ("parameter", c_int32),
        ("buffer", c_int32),
        ("is_const", c_int32),
        ("is_initialised", c_int32),
        ("element_size", c_uint32),
        ("reserved", c_uint32),
    ]


class SharedVariableRecord(ctypes.Structure):
    _fields_: ClassVar = [("offset", c_uint64), ("bytes", c_uint64), ("index", c_int32), ("reserved", c_int32)]


class LaunchRequest(ctypes.Structure):
    _fields_: ClassVar = [
        ("kernel", c_int32),
        ("schedule", c_int32),
        ("shuffle_blocks", c_int32),
        ("cooperative", c_int32),
        ("seed", c_uint64),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared_bytes", c_uint64),
        ("values", POINTER(c_void_p)),
        ("arguments", POINTER(ArgumentRecord)),
        ("argument_count", c_uint64),
        ("shared_variables", POINTER(SharedVariableRecord)),
        ("shared_variable_count", c_uint64),
    ]


class TrafficRecord(ctypes.Structure):
    _fields_: ClassVar = [
        ("program_counter", c_uint64),
        ("parameter", c_int32),
        ("access", c_int32),
        ("width", c_uint64),
        ("accesses", c_uint64),
        ("bytes", c_uint64),
        ("requests", c_uint64),
        ("sectors", c_uint64),
        ("lines", c_uint64),
        ("wavefronts", c_uint64),
        ("ideal_wavefronts", c_uint64),
    ]


class FootprintRecord(ctypes.Structure):
    _fields_: ClassVar = [
        ("parameter", c_int32),
        ("reserved", c_int32),
        ("bytes_loaded", c_uint64),
        ("bytes_stored", c_uint64),
        ("sectors_loaded", c_uint64),
        ("sectors_stored", c_uint64),
    ]


class LaunchResult(ctypes.Structure):
    _fields_: ClassVar = [
        ("status", c_int32),
        ("reserved", c_int32),
        ("message", c_char_p),
        ("threads_run", c_uint64),
        ("shared_bytes_touched", c_uint64),
        ("traffic", POINTER(TrafficRecord)),
        ("traffic_count", c_uint64),
        ("footprints", POINTER(FootprintRecord)),
        ("footprint_count", c_uint64),
    ]
