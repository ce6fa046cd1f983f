// Which instruction sets this CPU and this library have, and the table of functions of each. An instruction set takes
// what its own files do not define from the one below it, so AMX needs to bring matrix products and attention alone.
#include <cstring>
#include <initializer_list>

#include "isa.h"
#include "parts.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace baton {
namespace {

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false, amx = false;
};

// Linux gives AMX's 8 KB of state only to a process that asks for it, once.
bool ask_for_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Cpu detect() {
  unsigned a, b, c, d, b7, c7, d7, a71, b71, c71, d71;
  Cpu cpu;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return cpu;
  unsigned low, high;  // XCR0: the registers that the kernel saves
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_avx = (low & 0x6) == 0x6, saves_avx512 = (low & 0xe6) == 0xe6, saves_tiles = (low & 0x60000) == 0x60000;
  cpu.avx2 = saves_avx && (c & bit_FMA) && (c & bit_F16C) && (b7 & bit_AVX2);
  const unsigned base = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  const bool vnni = c7 & (1u << 11), vbmi = c7 & (1u << 1);
  const bool bf16 = __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && (a71 & (1u << 5));
  cpu.avx512 = cpu.avx2 && saves_avx512 && (b7 & base) == base && vnni && vbmi && bf16;
  const unsigned tiles = (1u << 22) | (1u << 24) | (1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
  cpu.amx = cpu.avx512 && saves_tiles && (d7 & tiles) == tiles && ask_for_amx();
  return cpu;
}

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}
#endif

template <typename F>
F first(F own, F below) {
  return own ? own : below;
}

// The functions of one namespace, over those of the table below it.
#define BATON_TABLE(isa, below)                                                                                  \
  Isa {                                                                                                          \
    #isa, first(isa::rms_norm, (below).rms_norm), first(isa::to_activation, (below).to_activation),              \
        first(isa::swiglu, (below).swiglu), first(isa::rope, (below).rope), first(isa::weigh, (below).weigh),    \
        first(isa::keep_logits, (below).keep_logits), first(isa::store_kv, (below).store_kv),                    \
        first(isa::linear, (below).linear), first(isa::attention, (below).attention),                            \
        first(isa::attention_scratch_bytes, (below).attention_scratch_bytes),                                    \
        isa::attention_rows ? isa::attention_rows() : (below).attention_rows,                                    \
        first(isa::thread_begin, (below).thread_begin), first(isa::thread_end, (below).thread_end)               \
  }

}  // namespace

const Isa& isa_scalar() {
  static const Isa table = BATON_TABLE(scalar, Isa{});
  return table;
}

#if defined(__x86_64__)
const Isa& isa_avx2() {
  static const Isa table = BATON_TABLE(avx2, isa_scalar());
  return table;
}

const Isa& isa_avx512() {
  static const Isa table = BATON_TABLE(avx512, isa_avx2());
  return table;
}

const Isa& isa_amx() {
  static const Isa table = BATON_TABLE(amx, isa_avx512());
  return table;
}
#endif

const Isa* find_isa(const char* name) {
  if (!std::strcmp(name, "scalar")) return &isa_scalar();
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx2") && cpu().avx2 && avx2::linear) return &isa_avx2();
  if (!std::strcmp(name, "avx512") && cpu().avx512 && avx512::linear) return &isa_avx512();
  if (!std::strcmp(name, "amx") && cpu().amx && amx::linear) return &isa_amx();
#endif
  return nullptr;
}

}  // namespace baton

int32_t baton_has_isa(const char* isa) { return baton::find_isa(isa) != nullptr; }

const char* baton_best_isa(void) {
  for (const char* name : {"amx", "avx512", "avx2"})
    if (baton::find_isa(name)) return name;
  return "scalar";
}
