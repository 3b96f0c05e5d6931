// The state of a launch: CTAs, warps, groups of lanes, shared memory, and the accesses that are under way.
#pragma once
#include <algorithm>
#include "order.h"

enum Op {
#define U(name, ...) op_##name,
#define B U
#define T U
#define F1 U
#define F2 U
#define F3 U
#define X U
#define H1(name, ...) op_##name##_f16, op_##name##_f16x2, op_##name##_bf16, op_##name##_bf16x2,
#define H2 H1
#define H3 H1
#include "operations.def"
};

// In the order of KINDS in findings.py.
enum Kind {
  RACE_WRITE_WRITE, RACE_WRITE_READ, RACE_READ_WRITE, OUT_OF_BOUNDS, GAP, MISALIGNED, UNWRITTEN, SHARED_BOUNDS,
  SHARED_UNWRITTEN, IN_FLIGHT, NO_PROXY_FENCE, NOT_PUBLISHED, DIVERGENT, IDLE_LANE, TRAPPED, ENDLESS
};
struct Instruction {
  s32 op, guard;   // guard: twice the predicate, plus 1 where it is negated; -1: none
  s32 o[16];       // places of registers; of constants the complement; NONE: no operand; of predicates their number
  s64 imm;
  s32 a, b, c, d;  // as encode.py and the function of the operation have them
};
struct Region { u64 base, size; u8 *valid, *written; s32 grain, tracked, changed, unused; };
struct Report { s32 kind, pc, other_pc, space; u64 address; s32 cta, thread, other_cta, other_thread; s64 count; };
struct Schedule { u64 seed; s64 resident, burst, priorities, order, races, split, late, limit; };
struct Kernel {
  std::vector<Instruction> code;
  std::vector<u64> constants;
  std::vector<s32> extra;
  s64 register_bytes, predicates;
};

static const s32 NONE = INT32_MIN;
static const u32 SHARED_BASE = 1024;
static const u8 NEVER_WRITTEN = 0, THERE = 1, UNDER_WAY = 2;  // of a byte of shared memory

struct Random {
  u64 state;
  u64 next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1DULL;
  }
  u32 below(u32 n) { return n ? (u32)((next() >> 33) % n) : 0; }
};
struct Copy { int lane, pc; u32 to, size, given, group; u64 from; u8 data[16]; };  // a cp.async under way
struct Product {                                                              // a wgmma under way
  const Instruction* i;
  int pc;
  u32 group;
  u64 b_descriptor;
  bool has_sum;  // the sum it adds to is known, not the result of another that is under way
  std::vector<float> sum, a, b;
  std::vector<u32> cells;  // of shared memory that it reads
};
struct Group { u32 lanes; int pc; bool waits; };  // lanes of a warp at one place
struct Cta;
struct Warp {
  Cta* cta;
  int id;
  u32 full, exited, ordered[32], copy_group[32], product_group;  // ordered: clocks as of the last bar.warp.sync
  std::vector<Group> groups;
  bool at_barrier, done;
  int barrier_pc;
  std::vector<char> registers;
  std::vector<u32> predicates;
  std::vector<Copy> copies;
  std::vector<Product> products;
  u64 priority;
};
struct Cta {
  int linear, done;
  u32 id[3];
  bool live;
  std::vector<Warp> warps;
  std::vector<u8> shared, state;         // state: of each byte
  std::vector<Cell> cells;               // of shared memory
  std::vector<u64> written_at, fenced_at;  // by cell, by thread: the count of instructions then
  std::vector<u16> read_by_products;     // by cell: products under way
  std::vector<u32> clock, ordered;       // by thread: its clock; as of the last barrier
  std::vector<KnownPtr> known, fenced, relaxed;  // by thread: now, at its last fence, by relaxed loads since
};

#define LANES for (int l = 0; l < 32; l++)

struct At { Cta& c; Warp& w; int lane, pc; int thread() const { return w.id * 32 + lane; } };

struct Machine {
  const Kernel& kernel;
  const Schedule schedule;
  const u8* parameters;
  u32 grid[3];
  int threads;
  u32 shared_bytes;
  int shared_grain;
  Region* regions;
  int n_regions;
  Report* reports;
  int max_reports, n_reports = 0, last_region = 0;
  s64 instructions = 0;
  Random random;
  bool ended = false;
  std::unordered_map<u64, int> reported;
  std::vector<std::vector<Cell>> cells;  // by region
  std::unordered_map<u64, Synchronisation> synchronised;
  std::vector<Cta> slots;
  std::vector<u32> order;
  u64 next_cta = 0;

  void record(const Report& r);
  void report(int kind, const At& at, u64 address, int space = 0, int mode = 0);
  // memory.h
  bool before(const Access& x, const At& at);
  void conflict(int kind, const Access& x, const At& at, u64 address, int space);
  void keep(Access* slots, int n, const Access& mine, const At& at);
  void on_read(Cell& cell, const At& at, u64 address, int space, bool strong, bool whole_warp = false);
  void on_write(Cell& cell, const At& at, u64 address, int space, bool strong, bool same_value);
  KnownPtr own_clock(const At& at);
  void order_warp(Cta& c, Warp& w, u32 lanes);
  void order_cta(Cta& c);
  void acquire(const At& at, u64 address, bool now);
  void release(const At& at, u64 address, bool now, int scope, bool adds);
  void fence(const At& at);
  Region* find(u64 address, u32 size);
  u8* global(const At& at, u64 address, u32 size, int mode, bool strong, const u8* value);
  u8* shared(const At& at, u32 address, u32 size, u32 alignment, int mode, bool strong, const u8* value,
             bool async = false);
  void check_published();
  // registers
  template <class V> V* to(Warp& w, s32 place) { return (V*)(w.registers.data() + place); }
  template <class V> const V* from(const Warp& w, s32 place) {
    return (const V*)(place >= 0 ? w.registers.data() + place : (const char*)kernel.constants.data() + ~place);
  }
  template <class V> void set(Warp& w, s32 place, const V* value, u32 lanes) {
    V* target = to<V>(w, place);
    if (lanes == ~0u) memcpy(target, value, 32 * sizeof(V));
    else LANES if (lanes >> l & 1) target[l] = value[l];
  }
  void set_predicate(Warp& w, s32 p, u32 value, u32 lanes) {
    w.predicates[p] = (w.predicates[p] & ~lanes) | (value & lanes);
  }
  // execute.cpp, tensor.h
  void execute(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void special(Cta& c, Warp& w, const Instruction& i, u32 lanes);
  void load_parameter(Warp& w, const Instruction& i, u32 lanes);
  void compare(Warp& w, const Instruction& i, u32 lanes);
  void convert(Warp& w, const Instruction& i, u32 lanes);
  void load(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void store(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void atomic(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void copy_async(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void land(Cta& c, Warp& w, const Copy& copy);
  void wait_for_copies(Cta& c, Warp& w, u32 lanes, u32 but);
  void matrix(Cta& c, Warp& w, const Instruction& i, int pc);
  void shuffle(Cta& c, Warp& w, const Instruction& i, u32 lanes, int pc);
  void vote(Warp& w, const Instruction& i, u32 lanes);
  void reduce(Warp& w, const Instruction& i, u32 lanes);
  void multiply(Warp& w, const Instruction& i);
  void tile(const At& at, u64 descriptor, int first, int n, int k, bool transposed, int type,
            std::vector<float>& values, std::vector<u32>* cells);
  void check_product(const At& at, std::vector<u32>& cells);
  void start_product(Cta& c, Warp& w, const Instruction& i, int pc, bool adds);
  void finish_product(Cta& c, Warp& w, Product& p);
  void wait_for_products(Cta& c, Warp& w, u32 but);
  // schedule
  void start(Cta& c, u32 linear);
  void check_barrier(Cta& c);
  void finish(Cta& c, Warp& w);
  bool step(Cta& c, Warp& w, size_t g, s64& budget);
  void burst(Cta& c, Warp& w, s64 budget);
  bool run();
};
