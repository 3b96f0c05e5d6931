// Executes the PTX of one launch, thread by thread, under one schedule of its warps.
#include "tensor.h"

static const u64 GARBAGE = 0xC5C5C5C5C5C5C5C5ull;  // what a faulty load returns

// ---- operations on registers: operations.def, each applied to all lanes
template <class R, class A, class F> static void apply(Machine& m, Warp& w, const Instruction& i, u32 lanes, F f) {
  const A* a = m.from<A>(w, i.o[1]);
  R r[32];
  LANES r[l] = f(a[l]);
  m.set(w, i.o[0], r, lanes);
}
template <class R, class A, class B, class F>
static void apply(Machine& m, Warp& w, const Instruction& i, u32 lanes, F f) {
  const A* a = m.from<A>(w, i.o[1]);
  const B* b = m.from<B>(w, i.o[2]);
  R r[32];
  LANES r[l] = f(a[l], b[l]);
  m.set(w, i.o[0], r, lanes);
}
template <class R, class A, class B, class C, class F>
static void apply(Machine& m, Warp& w, const Instruction& i, u32 lanes, F f) {
  const A* a = m.from<A>(w, i.o[1]);
  const B* b = m.from<B>(w, i.o[2]);
  const C* c = m.from<C>(w, i.o[3]);
  R r[32];
  LANES r[l] = f(a[l], b[l], c[l]);
  m.set(w, i.o[0], r, lanes);
}
// n operands of one of f16, f16x2, bf16, bf16x2 (0 to 3)
template <class F> static void apply_half(Machine& m, Warp& w, const Instruction& i, u32 lanes, int type, int n, F f) {
  u32 r[32];
  LANES {
    r[l] = 0;
    for (int q = 0; q < (type & 1 ? 2 : 1); q++) {
      double x[3] = {};
      for (int p = 0; p < n; p++) {
        u16 bits = (u16)(m.from<u32>(w, i.o[p + 1])[l] >> 16 * q);
        x[p] = type & 2 ? from_bfloat(bits) : from_half(bits);
      }
      double value = f(x[0], x[1], x[2]);
      r[l] |= (u32)(type & 2 ? to_bfloat(value) : to_half(value)) << 16 * q;
    }
  }
  m.set(w, i.o[0], r, lanes);
}

void Machine::execute(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  Machine& m = *this;
  const bool ftz = i.a;
#define U(name, R, A, value) case op_##name: return apply<R, A>(m, w, i, lanes, [](A a) -> R { return value; });
#define B(name, R, A, B_, value) \
  case op_##name: return apply<R, A, B_>(m, w, i, lanes, [](A a, B_ b) -> R { return value; });
#define T(name, R, A, B_, C, value) \
  case op_##name: return apply<R, A, B_, C>(m, w, i, lanes, [](A a, B_ b, C c) -> R { return value; });
#define F1(name, value) \
  case op_##name: { \
    auto f = [](float a) -> float { return value; }; \
    if (!ftz) return apply<float, float>(m, w, i, lanes, f); \
    return apply<float, float>(m, w, i, lanes, [f](float a) { return flushed(f(flushed(a))); }); \
  }
#define F2(name, value) \
  case op_##name: { \
    auto f = [](float a, float b) -> float { return value; }; \
    if (!ftz) return apply<float, float, float>(m, w, i, lanes, f); \
    auto flushing = [f](float a, float b) { return flushed(f(flushed(a), flushed(b))); }; \
    return apply<float, float, float>(m, w, i, lanes, flushing); \
  }
#define F3(name, value) \
  case op_##name: { \
    auto f = [](float a, float b, float c) -> float { return value; }; \
    if (!ftz) return apply<float, float, float, float>(m, w, i, lanes, f); \
    return apply<float, float, float, float>( \
        m, w, i, lanes, [f](float a, float b, float c) { return flushed(f(flushed(a), flushed(b), flushed(c))); }); \
  }
#define H(name, n, value) \
  case op_##name##_f16: case op_##name##_f16x2: case op_##name##_bf16: case op_##name##_bf16x2: \
    return apply_half(m, w, i, lanes, i.op - op_##name##_f16, n, \
                      [](double a, [[maybe_unused]] double b, [[maybe_unused]] double c) -> double { return value; });
#define H1(name, value) H(name, 1, value)
#define H2(name, value) H(name, 2, value)
#define H3(name, value) H(name, 3, value)
#define X(name)
  switch (i.op) {
#include "operations.def"
    case op_nop: case op_wgmma_fence: return;
    case op_special: return special(c, w, i, lanes);
    case op_parameter: return load_parameter(w, i, lanes);
    case op_lop3: {
      const u32 *x = from<u32>(w, i.o[1]), *y = from<u32>(w, i.o[2]), *z = from<u32>(w, i.o[3]);
      u32 r[32] = {};
      for (int q = 0; q < 8; q++)
        if (i.imm >> q & 1) LANES r[l] |= (q & 4 ? x[l] : ~x[l]) & (q & 2 ? y[l] : ~y[l]) & (q & 1 ? z[l] : ~z[l]);
      return set(w, i.o[0], r, lanes);
    }
    case op_selp_b32: case op_selp_b64: {
      u32 p = w.predicates[i.o[3]] ^ (i.a ? ~0u : 0);
      bool wide = i.op == op_selp_b64;
      for (int part = 0; part < 2; part++) {  // where it is chosen, and where it is not
        if (wide) set(w, i.o[0], from<u64>(w, i.o[1 + part]), lanes & (part ? ~p : p));
        else set(w, i.o[0], from<u32>(w, i.o[1 + part]), lanes & (part ? ~p : p));
      }
      return;
    }
    case op_setp: return compare(w, i, lanes);
    case op_cvt: return convert(w, i, lanes);
    case op_and_pred: return set_predicate(w, i.o[0], w.predicates[i.o[1]] & w.predicates[i.o[2]], lanes);
    case op_or_pred: return set_predicate(w, i.o[0], w.predicates[i.o[1]] | w.predicates[i.o[2]], lanes);
    case op_xor_pred: return set_predicate(w, i.o[0], w.predicates[i.o[1]] ^ w.predicates[i.o[2]], lanes);
    case op_not_pred: return set_predicate(w, i.o[0], ~w.predicates[i.o[1]], lanes);
    case op_mov_pred: return set_predicate(w, i.o[0], w.predicates[i.o[1]], lanes);
    case op_load: return load(c, w, i, lanes, pc);
    case op_store: return store(c, w, i, lanes, pc);
    case op_atomic: return atomic(c, w, i, lanes, pc);
    case op_copy_async: return copy_async(c, w, i, lanes, pc);
    case op_copy_commit: LANES w.copy_group[l] += lanes >> l & 1; return;
    case op_copy_wait: return wait_for_copies(c, w, lanes, (u32)i.imm);
    case op_fence: if (schedule.races) LANES if (lanes >> l & 1) fence({c, w, l, pc}); return;
    case op_proxy_fence: LANES if (lanes >> l & 1) c.fenced_at[w.id * 32 + l] = instructions; return;
    case op_shfl: return shuffle(c, w, i, lanes, pc);
    case op_vote: return vote(w, i, lanes);
    case op_redux: return reduce(w, i, lanes);
    case op_bar_warp: return order_warp(c, w, lanes);
    case op_ldmatrix: case op_stmatrix: return matrix(c, w, i, pc);
    case op_mma: return multiply(w, i);
    case op_wgmma: return start_product(c, w, i, pc, w.predicates[i.o[0]] & 1);
    case op_wgmma_commit: w.product_group++; return;
    case op_wgmma_wait: return wait_for_products(c, w, (u32)i.imm);
    default: report(TRAPPED, {c, w, __builtin_ctz(lanes), pc}, 0); ended = true;
  }
}

// a: which, as encode.py's SPECIAL; b: 64 bits
void Machine::special(Cta& c, Warp& w, const Instruction& i, u32 lanes) {
  u64 wide[32];
  u32 narrow[32];
  LANES {
    u64 of[] = {u64(w.id * 32 + l), 0, 0, (u64)threads, 1, 1, c.id[0], c.id[1], c.id[2], grid[0], grid[1], grid[2],
                (u64)l, (u64)w.id, (u64)instructions, 0};
    narrow[l] = (u32)(wide[l] = of[i.a]);
  }
  if (i.b) set(w, i.o[0], wide, lanes);
  else set(w, i.o[0], narrow, lanes);
}
// Elements of memory into registers. a: size, b: how many, c: 1 signed, 2 into registers of 64 bits, 4 of 16.
static void spread(Machine& m, Warp& w, const Instruction& i, int l, const u8* p) {
  for (int n = 0; n < i.b; n++) {
    if (i.o[n] == NONE) continue;
    u64 value = p ? 0 : GARBAGE;
    int unused = 64 - 8 * i.a;
    if (p) memcpy(&value, p + n * i.a, i.a);
    value = i.c & 1 ? (u64)((s64)(value << unused) >> unused) : value << unused >> unused;
    if (i.c & 2) m.to<u64>(w, i.o[n])[l] = value;
    else m.to<u32>(w, i.o[n])[l] = i.c & 4 ? (u16)value : (u32)value;
  }
}
void Machine::load_parameter(Warp& w, const Instruction& i, u32 lanes) {
  LANES
    if (lanes >> l & 1)
      spread(*this, w, i, l, parameters + i.imm + (i.d ? from<u64>(w, i.o[8])[l] : from<u32>(w, i.o[8])[l]));
}
// a: comparison, as encode.py's COMPARISONS; b: type; c: 1 and, 2 or, 3 xor with a predicate, that is negated if imm;
// d: ftz
template <class V> static u32 compared(Machine& m, Warp& w, const Instruction& i, V (*value)(const void*, int)) {
  const void *x = m.from<char>(w, i.o[1]), *y = m.from<char>(w, i.o[2]);
  u32 r = 0;
  LANES {
    V a = value(x, l), b = value(y, l);
    bool nan = a != a || b != b;
    bool of[] = {a == b, a != b && !nan, a < b, a <= b, a > b, a >= b, nan};
    r |= (u32)(i.a == 13 ? !nan : i.a < 6 ? of[i.a] : i.a == 12 ? nan : nan || of[i.a - 6]) << l;
  }
  return r;
}
void Machine::compare(Warp& w, const Instruction& i, u32 lanes) {
  u32 r = 0;
  switch (i.b) {
    case 0: r = compared<u32>(*this, w, i, [](const void* p, int l) { return ((const u32*)p)[l]; }); break;
    case 1: r = compared<s32>(*this, w, i, [](const void* p, int l) { return ((const s32*)p)[l]; }); break;
    case 2: r = compared<u64>(*this, w, i, [](const void* p, int l) { return ((const u64*)p)[l]; }); break;
    case 3: r = compared<s64>(*this, w, i, [](const void* p, int l) { return ((const s64*)p)[l]; }); break;
    case 4: r = compared<u16>(*this, w, i, [](const void* p, int l) { return (u16)((const u32*)p)[l]; }); break;
    case 5: r = compared<s16>(*this, w, i, [](const void* p, int l) { return (s16)((const u32*)p)[l]; }); break;
    case 6: r = i.d ? compared<float>(*this, w, i, [](const void* p, int l) { return flushed(((const float*)p)[l]); })
                    : compared<float>(*this, w, i, [](const void* p, int l) { return ((const float*)p)[l]; }); break;
    case 7: r = compared<double>(*this, w, i, [](const void* p, int l) { return ((const double*)p)[l]; }); break;
    case 8:
      r = compared<float>(*this, w, i, [](const void* p, int l) { return from_half((u16)((const u32*)p)[l]); });
      break;
    default:
      r = compared<float>(*this, w, i, [](const void* p, int l) { return from_bfloat((u16)((const u32*)p)[l]); });
  }
  if (i.c) {
    u32 other = w.predicates[i.o[3]] ^ (i.imm ? ~0u : 0);
    r = i.c == 1 ? r & other : i.c == 2 ? r | other : r ^ other;
  }
  set_predicate(w, i.o[0], r, lanes);
}

// Types of conversions, as encode.py's CONVERSIONS.
enum { U8, U16, U32, U64, S8, S16, S32, S64, F16, BF16, F32, F64, F16X2, BF16X2, E4M3X2, TF32 };
static s64 clamped(double x, int to) {  // what an integer type has of it
  static const double low[] = {0, 0, 0, 0, -0x1p7, -0x1p15, -0x1p31, -0x1p63};
  static const double high[] = {0x1p8, 0x1p16, 0x1p32, 0x1p64, 0x1p7, 0x1p15, 0x1p31, 0x1p63};
  if (x != x) return to == U64 || to == S64 ? INT64_MIN : 0;
  if (x <= low[to]) return (s64)low[to];
  if (x >= high[to]) return to == U64 ? -1 : to == S64 ? INT64_MAX : (s64)high[to] - 1;
  return to == U64 ? (s64)(u64)x : (s64)x;
}
static u64 float_bits(double x, int to) {
  switch (to) {
    case F16: return to_half(x);
    case BF16: return to_bfloat(x);
    case F32: return as<u32>((float)x);
    case TF32: return (as<u32>((float)x) + 0x1000) & 0xffffe000u;
    default: return as<u64>(x);
  }
}
// a: to, b: from, c: rounding to an integer, 1 to nearest, 2 to 0, 3 down, 4 up; d: 1 ftz, 2 sat, 4 to and 8 from 64
// bits, 16 to 16 bits
void Machine::convert(Warp& w, const Instruction& i, u32 lanes) {
  u64 wide[32];
  u32 narrow[32];
  LANES {
    u64 x = i.d & 8 ? from<u64>(w, i.o[1])[l] : from<u32>(w, i.o[1])[l], r = 0;
    if (i.a == F16X2 || i.a == BF16X2) {
      float high, low;
      if (i.b == E4M3X2) high = from_e4m3(x >> 8), low = from_e4m3(x);
      else high = as<float>((u32)x), low = from<float>(w, i.o[2])[l];
      r = i.a == F16X2 ? (u32)to_half(high) << 16 | to_half(low) : (u32)to_bfloat(high) << 16 | to_bfloat(low);
    } else if (i.b <= S64) {
      s64 n = i.b == U8 ? (u8)x : i.b == U16 ? (u16)x : i.b == U32 ? (s64)(u32)x : i.b == S8 ? (int8_t)x
              : i.b == S16 ? (s16)x : i.b == S32 ? (s32)x : (s64)x;
      if (i.a > S64)
        r = i.a == F32 ? as<u32>(i.b == U64 ? (float)(u64)n : (float)n)
                       : float_bits(i.b == U64 ? (double)(u64)n : (double)n, i.a);
      else r = i.a == U8 ? (u8)n : i.a == U16 ? (u16)n : i.a == U32 ? (u32)n : i.a == S8 ? (s64)(int8_t)n
               : i.a == S16 ? (s64)(s16)n : i.a == S32 ? (s64)(s32)n : n;
    } else {
      double v = i.b == F16    ? from_half((u16)x)
                 : i.b == BF16 ? from_bfloat((u16)x)
                 : i.b == F32  ? as<float>((u32)x)
                               : as<double>(x);
      if (i.d & 1 && i.b == F32) v = flushed((float)v);
      v = i.c == 1   ? std::nearbyint(v)
          : i.c == 2 ? std::trunc(v)
          : i.c == 3 ? std::floor(v)
          : i.c == 4 ? std::ceil(v)
                     : v;
      if (i.d & 2 && i.a > S64) v = v != v || v < 0 ? 0 : v > 1 ? 1 : v;
      r = i.a <= S64 ? (u64)clamped(v, i.a) : float_bits(v, i.a);
      if (i.d & 1 && i.a == F32) r = as<u32>(flushed(as<float>((u32)r)));
    }
    narrow[l] = (u32)(wide[l] = r);
    if (i.d & 16) narrow[l] &= 0xffff;
  }
  if (i.d & 4) set(w, i.o[0], wide, lanes);
  else set(w, i.o[0], narrow, lanes);
}

// ---- memory. Addresses are in o[8], of global memory in 64 bits, of shared memory in 32; imm is added to them.
// d: 1 strong (an order of its own), 2 acquire or release, 4 to shared memory, 8 its address has 64 bits; scope << 4
static u64 address_of(Machine& m, Warp& w, const Instruction& i, int l) {
  bool wide = !(i.d & 4) || i.d & 8;
  u64 address = (wide ? m.from<u64>(w, i.o[8])[l] : m.from<u32>(w, i.o[8])[l]) + i.imm;
  return i.d & 4 ? (u32)address : address;
}
void Machine::load(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  u64 address[32];  // before the first load, whose target may be the register of the addresses
  LANES address[l] = address_of(*this, w, i, l);
  u32 size = i.a * i.b;
  LANES if (lanes >> l & 1) {
    At at{c, w, l, pc};
    const u8* p = i.d & 4 ? shared(at, address[l], size, size, 0, i.d & 1, nullptr)
                          : global(at, address[l], size, 0, i.d & 1, nullptr);
    if (i.d & 1 && !(i.d & 4) && schedule.races) acquire(at, address[l], i.d & 2);
    spread(*this, w, i, l, p);
  }
}
void Machine::store(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  u32 size = i.a * i.b;
  LANES if (lanes >> l & 1) {
    At at{c, w, l, pc};
    u64 address = address_of(*this, w, i, l);
    u8 value[64];
    for (int n = 0; n < i.b; n++) {
      const void* from_ = i.c & 2 ? (const void*)(from<u64>(w, i.o[n]) + l) : (const void*)(from<u32>(w, i.o[n]) + l);
      memcpy(value + n * i.a, from_, i.a);
    }
    u8* p = i.d & 4 ? shared(at, address, size, size, 1, i.d & 1, value) : global(at, address, size, 1, i.d & 1, value);
    if (p && !(i.d & 4) && schedule.races && (i.d & 1 || synchronised.count(address)))
      release(at, address, i.d & 2, i.d >> 4, false);
    if (p) memcpy(p, value, size);
  }
}
// As encode.py's ATOMICS.
enum { ADD, MIN_S, MIN_U, MAX_S, MAX_U, AND, OR, XOR, EXCHANGE, COMPARE, ADD_F };
template <class V, class S> static V updated(int op, V old, V value, V wanted) {
  switch (op) {
    case ADD: return old + value;
    case MIN_S: return (S)old < (S)value ? old : value;
    case MIN_U: return old < value ? old : value;
    case MAX_S: return (S)old > (S)value ? old : value;
    case MAX_U: return old > value ? old : value;
    case AND: return old & value;
    case OR: return old | value;
    case XOR: return old ^ value;
    case COMPARE: return old == wanted ? value : old;
    default: return value;
  }
}
template <class V, class S, class F> static V update(Machine& m, Warp& w, const Instruction& i, int l, u8* p) {
  V old, value = m.from<V>(w, i.o[1])[l];
  memcpy(&old, p, sizeof old);
  if (i.b == ADD_F) value = as<V>(as<F>(old) + as<F>(value));
  else if (i.b == COMPARE) value = updated<V, S>(i.b, old, m.from<V>(w, i.o[2])[l], value);
  else value = updated<V, S>(i.b, old, value, 0);
  memcpy(p, &value, sizeof value);
  return old;
}
// a: size, b: which, c: 1 acquires, 2 releases; d: as above. Lanes take turns from a random one on.
void Machine::atomic(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  int first = random.below(32);
  for (int n = 0; n < 32; n++) {
    int l = (n + first) & 31;
    if (!(lanes >> l & 1)) continue;
    At at{c, w, l, pc};
    u64 address = address_of(*this, w, i, l), old = GARBAGE,
        place = i.d & 4 ? (u64)(c.linear + 1) << 40 | address : address;
    u8* p = i.d & 4 ? shared(at, address, i.a, i.a, 2, true, nullptr) : global(at, address, i.a, 2, true, nullptr);
    if (p) {
      if (schedule.races) acquire(at, place, i.c & 1), release(at, place, i.c & 2, i.d & 4 ? 0 : i.d >> 4, true);
      if (i.a == 8) old = update<u64, s64, double>(*this, w, i, l, p);
      else old = update<u32, s32, float>(*this, w, i, l, p);
    }
    if (i.o[0] == NONE) continue;
    if (i.a == 8) to<u64>(w, i.o[0])[l] = old;
    else to<u32>(w, i.o[0])[l] = (u32)old;
  }
}
// a: size; b: o[2] has how many bytes are copied, the rest is 0. o: to (shared), from (global); imm and d: their
// offsets.
void Machine::copy_async(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  LANES if (lanes >> l & 1) {
    At at{c, w, l, pc};
    u32 size = i.a, given = i.b ? std::min(from<u32>(w, i.o[2])[l], size) : size;
    Copy copy{l, pc, from<u32>(w, i.o[0])[l] + (u32)i.imm, size, 0, w.copy_group[l], from<u64>(w, i.o[1])[l] + i.d, {}};
    if (given && given != size) report(TRAPPED, at, copy.from), ended = true;  // Triton copies all or nothing
    const u8* source = given ? global(at, copy.from, size, 0, false, nullptr) : nullptr;
    if (source) memcpy(copy.data, source, copy.given = size);
    u8* target = shared(at, copy.to, size, size, 1, false, nullptr, true);
    if (!target) continue;
    memset(&c.state[copy.to - SHARED_BASE], UNDER_WAY, size);
    memset(target, 0xA7, size);
    w.copies.push_back(copy);
  }
}
void Machine::land(Cta& c, Warp& w, const Copy& copy) {
  u32 offset = copy.to - SHARED_BASE;
  const void* source =
      schedule.late && copy.given ? (const void*)copy.from : copy.data;  // as it is now, or as it was at the start
  memcpy(&c.shared[offset], source, copy.size);
  memset(&c.state[offset], THERE, copy.size);
  u32 thread = w.id * 32 + copy.lane;
  for (u32 g = offset / shared_grain; g <= (offset + copy.size - 1) / shared_grain; g++) {
    c.written_at[g] = instructions;
    if (schedule.races)
      c.cells[g].write = {u32(c.linear * threads + thread + 1), c.clock[thread], (u32)copy.pc, false, false, false};
  }
}
void Machine::wait_for_copies(Cta& c, Warp& w, u32 lanes, u32 but) {
  size_t kept = 0;
  for (auto& copy : w.copies) {
    if (lanes >> copy.lane & 1 && (s64)copy.group < (s64)w.copy_group[copy.lane] - (s64)but) land(c, w, copy);
    else w.copies[kept++] = copy;
  }
  w.copies.resize(kept);
}
// a: matrices of 8 x 16 bytes; b: 1 transposed, 2 stored. Row q of matrix n is where lane 8n + q says.
void Machine::matrix(Cta& c, Warp& w, const Instruction& i, int pc) {
  u8 rows[32][16];
  u32 address[32];
  LANES address[l] = from<u32>(w, i.o[8])[l] + (u32)i.imm;
  auto halves = [&](bool out) {  // between rows and registers
    for (int n = 0; n < i.a; n++) LANES for (int h = 0; h < 2; h++) {
      int along = (l & 3) * 2 + h, across = l >> 2;
      u8* place = i.b & 1 ? rows[n * 8 + along] + across * 2 : rows[n * 8 + across] + along * 2;
      u8* register_ = (u8*)(to<u32>(w, i.o[n]) + l) + 2 * h;
      memcpy(out ? place : register_, out ? register_ : place, 2);
    }
  };
  bool stored = i.b & 2;
  if (stored) halves(true);
  for (int q = 0; q < i.a * 8; q++) {
    u8* p = shared({c, w, q, pc}, address[q], 16, 16, stored, false, stored ? rows[q] : nullptr);
    if (p) memcpy(stored ? p : rows[q], stored ? rows[q] : p, 16);
    else memset(rows[q], (u8)GARBAGE, 16);
  }
  if (!stored) halves(false);
}

// ---- exchange between lanes
// a: 0 up, 1 down, 2 bfly, 3 idx; o: result, value, distance, clamp, predicate
void Machine::shuffle(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc) {
  u32 value[32], r[32], inside = 0;
  memcpy(value, from<u32>(w, i.o[1]), sizeof value);
  LANES {
    int distance = from<u32>(w, i.o[2])[l] & 31, clamp = from<u32>(w, i.o[3])[l], segment = clamp >> 8 & 31,
        least_ = l & segment;
    int last = least_ | (clamp & 31 & ~segment);
    int source = i.a == 0   ? l - distance
                 : i.a == 1 ? l + distance
                 : i.a == 2 ? l ^ distance
                            : least_ | (distance & ~segment);
    bool valid = i.a == 0 ? source >= last : source <= last;
    if (!valid) source = l;
    if (lanes >> l & 1 && !(lanes >> source & 1)) report(IDLE_LANE, {c, w, l, pc}, 0);
    r[l] = value[source];
    inside |= (u32)valid << l;
  }
  set(w, i.o[0], r, lanes);
  if (i.o[4] != NONE) set_predicate(w, i.o[4], inside, lanes);
}
void Machine::vote(Warp& w, const Instruction& i, u32 lanes) {  // a: 0 ballot, 1 any, 2 all, 3 uni; b: negated
  u32 p = (w.predicates[i.o[1]] ^ (i.b ? ~0u : 0)) & lanes, r[32];
  LANES r[l] = p;
  if (i.a == 0) return set(w, i.o[0], r, lanes);
  bool value = i.a == 1 ? p : i.a == 2 ? p == lanes : p == lanes || !p;
  set_predicate(w, i.o[0], value ? ~0u : 0, lanes);
}
void Machine::reduce(Warp& w, const Instruction& i, u32 lanes) {  // a: as atomics
  const u32* value = from<u32>(w, i.o[1]);
  u32 first = __builtin_ctz(lanes), r[32], all = value[first];
  for (u32 l = first + 1; l < 32; l++) if (lanes >> l & 1) all = updated<u32, s32>(i.a, all, value[l], 0);
  LANES r[l] = all;
  set(w, i.o[0], r, lanes);
}

// ---- schedule
void Machine::start(Cta& c, u32 linear) {
  int n_warps = (threads + 31) / 32, n = n_warps * 32;
  size_t n_cells = shared_bytes / shared_grain + 2;
  c.linear = linear;
  c.id[0] = linear % grid[0], c.id[1] = linear / grid[0] % grid[1], c.id[2] = linear / grid[0] / grid[1];
  c.live = true;
  c.done = 0;
  c.shared.assign(shared_bytes + 16, 0xA7);
  c.state.assign(shared_bytes + 16, NEVER_WRITTEN);
  c.written_at.assign(n_cells, 0);
  c.read_by_products.assign(n_cells, 0);
  c.fenced_at.assign(n, 0);
  if (schedule.races) {
    c.cells.assign(n_cells, Cell{});
    c.clock.assign(n, 1);
    c.ordered.assign(n, 0);
    for (auto* each : {&c.known, &c.fenced, &c.relaxed}) each->assign(n, KnownPtr());
  }
  c.warps.assign(n_warps, Warp{});
  for (int q = 0; q < n_warps; q++) {
    Warp& w = c.warps[q];
    w.cta = &c;
    w.id = q;
    w.full = threads - q * 32 >= 32 ? ~0u : (1u << (threads - q * 32)) - 1;
    w.groups = {{w.full, 0, false}};
    w.registers.assign(kernel.register_bytes, (char)0xD9);
    w.predicates.assign(kernel.predicates + 2, 0);
    w.predicates[1] = ~0u;
    w.priority = random.next();
  }
}
void Machine::check_barrier(Cta& c) {  // open it if all warps are there
  Warp* last = nullptr;
  for (auto& w : c.warps) {
    if (w.done) continue;
    if (!w.at_barrier) return;
    if (last && kernel.code[w.barrier_pc].a != kernel.code[last->barrier_pc].a) {
      report(DIVERGENT, {c, w, 0, w.barrier_pc}, 0);
      ended = true;
      return;
    }
    last = &w;
  }
  if (!last) return;
  order_cta(c);
  for (auto& w : c.warps) if (w.at_barrier) w.at_barrier = false, w.groups[0].pc = w.barrier_pc + 1;
}
void Machine::finish(Cta& c, Warp& w) {
  w.done = true;
  w.copies.clear();
  while (!w.products.empty()) finish_product(c, w, w.products[0]), w.products.erase(w.products.begin());
  if (++c.done == (int)c.warps.size()) c.live = false;
  else check_barrier(c);
}
static void merge(Warp& w) {  // Groups at the same place go on together.
  for (size_t a = 0; a < w.groups.size(); a++) for (size_t b = a + 1; b < w.groups.size();) {
    if (w.groups[a].pc != w.groups[b].pc) { b++; continue; }
    w.groups[a].lanes |= w.groups[b].lanes;
    w.groups[a].waits = false;
    w.groups.erase(w.groups.begin() + b);
  }
}
// One instruction of a group. Returns false where the warp should choose its group anew, or can do nothing more now.
bool Machine::step(Cta& c, Warp& w, size_t g, s64& budget) {
  Group& group = w.groups[g];
  int pc = group.pc;
  const Instruction& i = kernel.code[pc];
  u32 lanes = group.lanes, present = w.full & ~w.exited;
  if (i.guard >= 0) lanes &= w.predicates[i.guard >> 1] ^ (i.guard & 1 ? ~0u : 0);
  bool whole = (i.op >= op_ldmatrix && i.op <= op_wgmma_wait) || i.op == op_bar;
  if (++instructions > schedule.limit) return report(ENDLESS, {c, w, 0, pc}, 0), ended = true, false;
  if (whole || (i.op >= op_shfl && i.op < op_ldmatrix)) {
    u32 needed = present & (whole ? ~0u : from<u32>(w, i.o[5])[__builtin_ctz(group.lanes)]);
    if (needed & ~group.lanes) return group.waits = true, false;
    if (whole && lanes != group.lanes) return report(DIVERGENT, {c, w, 0, pc}, 0), ended = true, false;
  }
  if (i.op == op_bra) {
    group.pc = lanes == group.lanes ? i.a : pc + 1;
    if (lanes && lanes != group.lanes) {
      group.lanes &= ~lanes;
      w.groups.push_back({lanes, i.a, false});
    } else if (w.groups.size() == 1) {
      return true;
    }
    return merge(w), false;
  }
  if (i.op == op_exit) {
    w.exited |= lanes;
    group.lanes &= ~lanes;
    group.pc = pc + 1;
    if (!group.lanes) w.groups.erase(w.groups.begin() + g);
    for (auto& each : w.groups) each.waits = false;
    if (w.groups.empty()) finish(c, w);
    return false;
  }
  if (i.op == op_bar) {
    w.at_barrier = true;
    w.barrier_pc = pc;
    return check_barrier(c), false;
  }
  if (lanes) execute(c, w, i, lanes, pc);
  group.pc = pc + 1;
  if (i.op >= op_load && i.op != op_mma) budget--;  // another warp may run between operations that others can see
  if (w.groups.size() > 1) {
    if (schedule.split) budget--;
    for (size_t q = 0; q < w.groups.size(); q++) if (q != g && w.groups[q].pc == group.pc) return merge(w), false;
  }
  return budget > 0 && !ended;
}
void Machine::burst(Cta& c, Warp& w, s64 budget) {
  std::vector<size_t> ready;
  for (size_t q = 0; q < w.groups.size(); q++) if (!w.groups[q].waits) ready.push_back(q);
  if (ready.empty()) {
    report(DIVERGENT, {c, w, 0, w.groups[0].pc}, 0, 0, w.groups[1].pc);
    ended = true;
    return;
  }
  size_t g = ready[0];  // the lowest place, so that they meet again, or any
  for (size_t q : ready) if (w.groups[q].pc < w.groups[g].pc) g = q;
  if (ready.size() > 1 && schedule.split && random.below(2)) g = ready[random.below(ready.size())];
  while (step(c, w, g, budget)) {}
}
bool Machine::run() {
  random.state = schedule.seed * 0x9E3779B97F4A7C15ULL + 0x1234567;
  for (int n = 0; n < 5; n++) random.next();
  u64 n_ctas = (u64)grid[0] * grid[1] * grid[2];
  for (u64 n = 0; n < n_ctas; n++) order.push_back((u32)n);
  if (schedule.order == 1) for (u64 n = n_ctas; n > 1; n--) std::swap(order[n - 1], order[random.below((u32)n)]);
  if (schedule.order == 2) std::reverse(order.begin(), order.end());
  cells.resize(n_regions);
  for (int r = 0; r < n_regions; r++)
    if (schedule.races && regions[r].tracked) cells[r].resize(regions[r].size / regions[r].grain + 2);
  slots.resize(std::min<u64>(schedule.resident, n_ctas));
  std::vector<Warp*> ready;
  while (!ended) {
    for (auto& c : slots) if (!c.live && next_cta < n_ctas) start(c, order[next_cta++]);
    ready.clear();
    for (auto& c : slots) if (c.live) for (auto& w : c.warps) if (!w.done && !w.at_barrier) ready.push_back(&w);
    if (ready.empty()) break;  // a barrier opens with its last warp, so nobody is left
    Warp* w = ready[random.below(ready.size())];
    if (schedule.priorities) {
      for (Warp* each : ready) if (each->priority > w->priority) w = each;
      if (random.below(20) == 0) w->priority = random.next();
    }
    burst(*w->cta, *w, schedule.burst <= 1 ? 1 : 1 + random.below((u32)(2 * schedule.burst - 1)));
  }
  if (schedule.races && !ended) check_published();
  return !ended;
}

extern "C" {
int ptx_instruction_size() { return sizeof(Instruction); }
void* ptx_kernel(const Instruction* code, s64 n, const u64* constants, s64 n_constants, const s32* extra, s64 n_extra,
                 s64 register_bytes, s64 predicates) {
  return new Kernel{
      {code, code + n}, {constants, constants + n_constants}, {extra, extra + n_extra}, register_bytes, predicates};
}
int ptx_run(void* kernel, const Schedule* schedule, const u8* parameters, const u32* grid, int threads,
            u32 shared_bytes, int shared_grain, Region* regions, int n_regions, Report* reports, int max_reports,
            int* n_reports, s64* instructions) {
  Machine m{*(Kernel*)kernel, *schedule, parameters, {grid[0], grid[1], grid[2]}, threads, shared_bytes, shared_grain,
            regions, n_regions, reports, max_reports};
  bool whole = m.run();
  *n_reports = m.n_reports;
  *instructions += m.instructions;
  return whole;
}
}
