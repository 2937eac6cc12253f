// The choice of one kernel table for the process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops.h"

namespace xlmr {

struct TableInfo {
  const KernelTable* table;
  uint32_t required;  // bits of Feature
};

// Every table of this build, the slowest first.
const std::vector<TableInfo>& built_tables();

// A table like `below`, with a name and products of its own, in integers or in bfloat16.
KernelTable with_int8(const KernelTable& below, const char* name, const Int8Ops& ops);
KernelTable with_bf16(const KernelTable& below, const char* name, const Bf16Ops& ops);

struct Choice {
  const KernelTable* table;
  std::string reason;
};

// The fastest table that the processor runs, or the one that the environment variable
// XLMR_EXT_ISA names. Throws std::runtime_error where that names no table of this build or one
// that the processor cannot run.
Choice choose_table(const char* forced);

// choose_table(getenv("XLMR_EXT_ISA")), decided at the first call.
const Choice& active();

// Makes later calls use another table; for tests, which run every table in one process.
void set_active(const char* name);

}  // namespace xlmr
