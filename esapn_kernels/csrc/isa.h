// All kernels of one instruction set; see isa_*.cpp, which define ESAPN_ISA and its registers.

namespace esapn {
namespace ESAPN_ISA {
namespace {

#include "vector.h"
#include "convert.h"
#include "products.h"
#include "compose.h"
#include "lookup_fwd.h"
#include "update.h"
#include "lookup_bwd.h"
#include "row_step.h"
#include "resize_move.h"

}  // namespace

#define ESAPN_TEXT(name) #name
#define ESAPN_NAME(name) ESAPN_TEXT(name)
extern const Kernels kernels;
const Kernels kernels = {
    ESAPN_NAME(ESAPN_ISA),
    {lookup_fwd<float>, lookup_fwd<double>},
    {lookup_bwd<float>, lookup_bwd<double>},
    {step_rows<float>, step_rows<double>},
    {compose<float>, compose<double>},
    {compose_bwd<float>, compose_bwd<double>},
    {move_rows<float>, move_rows<double>},
};

}  // namespace ESAPN_ISA
}  // namespace esapn
