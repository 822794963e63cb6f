# One place for the flags of every target of ours. No -m flag here or anywhere else: code for a CPU target lives in
# a `#pragma GCC target` region of its own translation unit, so that no shared inline function is compiled for it.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

add_library(ds_flags INTERFACE)
target_compile_options(
  ds_flags
  INTERFACE # a * b + c must round twice on every target: the same bits with and without FMA instructions
            -ffp-contract=off
            # sqrt as one instruction: nobody reads errno after it
            -fno-math-errno
            -Wall
            -Wextra
            -Wshadow
            $<$<BOOL:${DS_WERROR}>:-Werror>)
